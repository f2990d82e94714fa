"""The only modules that use what ray, torch and transformers do not promise to keep.

Each function or class names its reason; tests/compat checks that what it uses exists and behaves as expected. Nothing
is imported from the rest of raybge, and a library only inside the functions that need it.
"""
