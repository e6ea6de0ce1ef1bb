"""Values and their checks: YAML groups, the schema they fit, and what holds between them."""
