"""The server and command line of kontextd. Never imports torch, except through `kontextd_models.load_engine`."""
