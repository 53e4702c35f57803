"""PriME: shared LoRA adapters merged into personal ones, privately. One noun per module."""
