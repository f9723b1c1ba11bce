"""The families of denoisers that are known: one file each, found by the class of the model."""
