"""From options to what runs: imports of the package proper happen here, when a command needs them."""
