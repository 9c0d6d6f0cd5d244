{% for line in setup %}
{{ line }}
{% endfor %}
python={{ python }}
{% if pythonpath %}
# The launcher and the trainer of this checkout, also if the package is not installed.
export PYTHONPATH={{ pythonpath | quote }}${PYTHONPATH:+:$PYTHONPATH}
{% endif %}
