"""How the zoo models were made: one recipe, one file."""
