{{- /*
For a chart of yours whose dependency this one is, with the engine's pod in it. Each takes the context of this chart, (index .Subcharts "lora-extproc"):

  initContainers:    {{ include "lora-extproc.stager.container" $ours | nindent 8 }}
  volumes:           {{ include "lora-extproc.stager.volumes" $ours | nindent 8 }}
  of the engine's container,
  lifecycle:         {{ include "lora-extproc.stager.lifecycle" $ours | nindent 12 }}

The rest is the pod's own: a volume `adapters`, mounted in the engine at /srv/adapters, fsGroup 65532, terminationGracePeriodSeconds above stager.drain_s, and the engine's
flags. deploy/kubernetes/vllm/sidecar/deployment.yaml says what each is for; a test compares the two.
*/ -}}
{{- define "lora-extproc.stager.container" -}}
- name: stager
  restartPolicy: Always
  image: {{ include "lora-extproc.image" . }}
  {{- with .Values.image.pullPolicy }}
  imagePullPolicy: {{ . }}
  {{- end }}
  args: [stager, --config, /etc/lora-extproc/settings.yaml]
  {{- with .Values.stager.env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - {name: stager, containerPort: 9102}
    - {name: stager-http, containerPort: 9190}
  lifecycle:
    preStop:
      exec: {command: [sh, -c, kill -TERM 1]}
  startupProbe:
    httpGet: {path: /healthz, port: stager-http}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    httpGet: {path: /healthz, port: stager-http}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
    terminationGracePeriodSeconds: 5
  resources: {{- toYaml .Values.stager.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
    readOnlyRootFilesystem: true
    seccompProfile: {type: RuntimeDefault}
  volumeMounts:
    - {name: adapters, mountPath: /srv/adapters}
    - {name: stager-settings, mountPath: /etc/lora-extproc, readOnly: true}
    - {name: stager-tmp, mountPath: /tmp}
{{- end -}}

{{- define "lora-extproc.stager.volumes" -}}
- name: stager-settings
  configMap: {name: {{ include "lora-extproc.name" . }}-stager}
- name: stager-tmp
  emptyDir: {sizeLimit: 20Gi}
{{- end -}}

{{- define "lora-extproc.stager.lifecycle" -}}
preStop:
  exec: {command: [bash, -c, "while [ $SECONDS -lt 330 ] && (exec 3<>/dev/tcp/127.0.0.1/9190) 2>/dev/null; do sleep 1; done"]}
{{- end -}}
