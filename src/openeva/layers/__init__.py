"""Parts of transformers: torch only, one CPU process, no process group."""
