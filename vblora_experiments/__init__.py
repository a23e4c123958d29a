"""What the task folders share: flags, trainer, run records, and errors that a user can read."""
