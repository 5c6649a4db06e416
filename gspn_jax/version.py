"""The version of the package. pyproject.toml and gspn_jax.__version__ read it here; CHANGELOG.md says what changed."""

__version__ = "0.4.0"
