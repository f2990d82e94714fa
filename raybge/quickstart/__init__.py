"""The demo: mining, fine-tuning and evaluation on docstrings of installed packages."""
