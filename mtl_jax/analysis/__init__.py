"""Analysis: what methods do, looked at apart from a data set and its result."""
