"""Convoy: ConvNets on images in object storage, in every way that pays."""
