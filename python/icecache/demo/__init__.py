"""The demo: one long document, hidden needles, full attention beside IceCache and other methods.

document        the text, the needles in it and the questions about them
streaming       StreamingLLM that drops tokens
methods         what is compared
run             runs it all; rows of the table
trace           what IceCache looked at, for the report
picture         the table and one step as a picture
report          the self-contained HTML page (report.html is its template)
"""
