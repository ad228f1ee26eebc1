{{- define "lora-extproc.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "lora-extproc" $name) -}}{{- $name = printf "%s-lora-extproc" $name -}}{{- end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* By which objects of ours find each other; they never change. */}}
{{- define "lora-extproc.selector" -}}
app.kubernetes.io/name: lora-extproc
app.kubernetes.io/component: router
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lora-extproc.labels" -}}
{{ include "lora-extproc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lora-extproc.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
