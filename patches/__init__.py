if __name__ != "hf_sparse.patches":
    raise ImportError(
        f"import this package as hf_sparse.patches, not as {__name__}: under two names its classes would exist twice"
    )
