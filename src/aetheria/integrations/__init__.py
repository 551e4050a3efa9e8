"""A Weavelet for training code of other frameworks: Lightning, Transformers, Accelerate."""
