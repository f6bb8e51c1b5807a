"""Where does a model keep a concept? Causal tracing of the text encoder and of the UNet."""
