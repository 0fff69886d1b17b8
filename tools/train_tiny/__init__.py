"""Training and evaluation of the small models that come with this repository."""
