"""Language modelling: tokenisers, corpora as streams of tokens, the task, its baselines, perplexity by length.

shakespeare.txt.bz2: 40,000 lines of Shakespeare's plays, which are in the public domain (1,115,394 bytes), as chosen by
Andrej Karpathy for char-rnn (github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt).
"""
