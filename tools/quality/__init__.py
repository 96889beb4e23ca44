"""Parts of tools/quality_table.py: the rules that are compared, the texts they are judged on, the measures."""
