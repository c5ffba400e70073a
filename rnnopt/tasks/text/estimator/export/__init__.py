"""A fitted classifier in the formats of other libraries."""
