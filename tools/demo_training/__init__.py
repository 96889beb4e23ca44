"""How the demo checkpoint is made: data, tokenizer, MuonClip, training, evaluation, export. Not packaged."""
