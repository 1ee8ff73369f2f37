"""What operators share and none of them owns: argument checks, autograd plumbing, dropout's generator, work buffers."""
