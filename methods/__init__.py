"""The methods under benchmark: plain torch modules, free of configuration files, tracking, launchers and paths."""
