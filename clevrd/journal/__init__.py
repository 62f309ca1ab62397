"""The journal: who puts the messages of topics in order, and keeps them.

Every node reads the same log and gives each message its position by counting (`fold`). An engine
keeps the log; it knows nothing of topics' readers.
"""
