"""`make gpu`: what a machine with an NVIDIA GPU is to show, in stages, with no network and nothing but torch."""
