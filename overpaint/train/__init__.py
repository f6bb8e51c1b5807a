"""Recipes that train the models of the zoo, one file each."""
