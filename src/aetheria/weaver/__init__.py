"""The hub: runs, commands and what is reported, over HTTP and NATS. Without torch."""
