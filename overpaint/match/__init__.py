"""Where each place of one picture lies in another: dense correspondence by diffusion, with an uncertainty."""
