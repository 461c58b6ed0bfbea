"""`fcmae evaluate`: accuracy of weights, measured as the ConvNeXt V2 paper and timm do, or by nearest neighbours."""
