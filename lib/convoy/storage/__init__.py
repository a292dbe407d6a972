"""Floor 1: object stores, manifests, feature cache, commits, bundles. Blind to `vision` and to Ray."""
