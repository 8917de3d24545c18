"""Options: their types, variables, configuration file and completion."""
