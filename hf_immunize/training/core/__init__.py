"""What both trainers are made of: terms, their balance, the step, the guard, checkpoints; no model is known here."""
