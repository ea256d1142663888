"""A repository with releases of this project, for tests of updates: real commits, real tags."""
