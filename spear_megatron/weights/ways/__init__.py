"""The ways by which a gathered bucket reaches the servers."""
