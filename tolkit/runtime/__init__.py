"""Running a model on table rows fetched when they are needed."""
