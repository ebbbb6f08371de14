"""x"""
def generate(directory, token_transfers=1, seed=1): raise NotImplementedError
