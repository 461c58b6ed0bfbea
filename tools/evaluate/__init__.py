"""Weights against images: accuracy as ConvNeXt V2's paper and timm measure it, and nearest neighbours."""
