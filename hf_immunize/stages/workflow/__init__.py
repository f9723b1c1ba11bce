"""One run file for the whole main job: its stages, what each needs, what is still fresh, and running the rest."""
