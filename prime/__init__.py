"""PriME: shared LoRA adapters merged into personal ones, privately. A folder is a question, a module one noun."""
