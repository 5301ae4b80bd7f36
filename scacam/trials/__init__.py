"""Maps on trial: the network is asked again, of changed images and with other weights."""
