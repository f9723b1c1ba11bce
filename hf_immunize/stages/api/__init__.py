"""The main job from Python: the same stages, given models and data sets in memory, folders, or Hub ids."""
