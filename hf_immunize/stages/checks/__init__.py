"""What can be found wrong with a run file before anything is trained."""
