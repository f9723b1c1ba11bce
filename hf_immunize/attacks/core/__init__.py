"""What all attacks share: their shape, how runs are planned and queued, which trials go on."""
