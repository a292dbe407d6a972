"""Floor 1: decode, views, backbones, heads. Blind to `storage` and to Ray."""
