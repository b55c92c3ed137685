"""The optical memory: a history kept as text, pages, pixels and tokens inside a budget, and nothing lost that was acknowledged.

The durable half, from below: locks (who may write), blobs (files by their content), schema (tables and versions), records (what
goes in and comes out), words (the lexical index's text), view (reading), store (writing, in transactions), erase (forgetting, and
the search for what should be gone), check (verify).  None of these needs torch: bytes in, bytes out.
"""
