{{/*
All settings as YAML: the values, with what `global` says in the place of each that is not set.
*/}}
{{- define "culvert.settings" -}}
{{- $settings := deepCopy .Values -}}
{{- include "culvert.fill" (dict "into" $settings "from" (omit .Values.global "global")) -}}
{{- include "culvert.fill" (dict "into" $settings "from" (include "culvert.profile" $settings | fromYaml)) -}}
{{- toYaml $settings -}}
{{- end -}}

{{/*
Fills into a mapping what it lacks. `false` and 0 are not lacking: somebody said them.
*/}}
{{- define "culvert.fill" -}}
{{- range $key, $value := .from -}}
  {{- $own := get $.into $key -}}
  {{- if and (kindIs "map" $own) (kindIs "map" $value) -}}
    {{- include "culvert.fill" (dict "into" $own "from" $value) -}}
  {{- else if or (not (hasKey $.into $key)) (kindIs "invalid" $own) (and (empty $own) (not (kindIs "bool" $own)) (not (kindIs "float64" $own))) -}}
    {{- $_ := set $.into $key $value -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/*
What a platform or a profile changes for a node agent.
*/}}
{{- define "culvert.profile" -}}
{{- if eq (toString .platform) "openshift" }}
seLinuxOptions:
  type: spc_t
{{- else if eq (toString .platform) "gke" }}
resourceQuotas:
  enabled: true
{{- end }}
{{- if eq (toString .profile) "ambient" }}
meshConfig:
  defaultConfig:
    proxyMetadata:
      ISTIO_META_ENABLE_HBONE: "true"
{{- else if eq (toString .profile) "preview" }}
meshConfig:
  defaultConfig:
    proxyMetadata:
      ISTIO_META_DNS_CAPTURE: "true"
{{- end }}
{{- end -}}

{{- define "culvert.name" -}}
{{- .resourceName | default "culvert" -}}
{{- end -}}

{{- define "culvert.account" -}}
{{- .serviceAccount.name | default .resourceName | default "ztunnel" -}}
{{- end -}}

{{/* `true`, or nothing. */}}
{{- define "culvert.makesAccount" -}}
{{- if hasKey .serviceAccount "create" -}}
  {{- if .serviceAccount.create }}true{{ end -}}
{{- else if .resourceName -}}
  true
{{- end -}}
{{- end -}}

{{- define "culvert.image" -}}
{{- if contains "/" .settings.image -}}
  {{- .settings.image -}}
{{- else -}}
  {{- $hub := required "hub is not set: say in which registry the image is, as --set hub=registry.example.com/mesh, or give the whole reference as image" .settings.hub -}}
  {{- $variant := .settings.variant | default "" | toString -}}
  {{- $suffix := ternary "" (printf "-%s" $variant) (or (eq $variant "") (eq $variant "distroless")) -}}
  {{- printf "%s/%s:%s%s" (trimSuffix "/" $hub) .settings.image (.settings.tag | default .root.Chart.AppVersion | toString) $suffix -}}
{{- end -}}
{{- end -}}

{{- define "culvert.istiod" -}}
istiod{{ with .revision }}-{{ . }}{{ end }}.{{ .istioNamespace }}.svc:15012
{{- end -}}

{{/*
By which a DaemonSet knows its pods. One that takes over the name `ztunnel` has to keep that one's selector, which cannot
be changed.
*/}}
{{- define "culvert.selector" -}}
app: ztunnel
{{- if ne (include "culvert.name" .settings) "ztunnel" }}
app.kubernetes.io/name: culvert
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}
{{- end -}}

{{/*
Labels of every object.
*/}}
{{- define "culvert.labels" -}}
{{- $labels := dict
  "app.kubernetes.io/name" "culvert"
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/version" (toString .root.Chart.AppVersion)
  "app.kubernetes.io/part-of" "istio"
  "app.kubernetes.io/managed-by" .root.Release.Service
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) -}}
{{- toYaml (mergeOverwrite $labels (.settings.labels | default dict)) -}}
{{- end -}}

{{/*
The head of every object of the namespace; `culvert.headOfCluster` is that of the others.
*/}}
{{- define "culvert.head" -}}
namespace: {{ .root.Release.Namespace | quote }}
{{ include "culvert.headOfCluster" . }}
{{- end -}}

{{- define "culvert.headOfCluster" -}}
labels:
  {{- include "culvert.labels" . | nindent 2 }}
{{- $annotations := deepCopy (.settings.annotations | default dict) -}}
{{- with .settings.revision }}{{ $_ := set $annotations "istio.io/rev" . }}{{ end -}}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
The agent's variables that are known here, as a mapping: no name stands twice, and the operator's win.
*/}}
{{- define "culvert.variables" -}}
{{- $istiod := include "culvert.istiod" . -}}
{{- $env := dict
  "XDS_ADDRESS" (.xdsAddress | default $istiod)
  "CA_ADDRESS" (.caAddress | default $istiod)
  "ISTIO_META_CLUSTER_ID" (.multiCluster.clusterName | default "Kubernetes")
  "RUST_LOG" .logLevel
  "TERMINATION_GRACE_PERIOD_SECONDS" (.terminationGracePeriodSeconds | int)
  "CULVERT_REDIRECT" .culvert.redirect -}}
{{- if .logAsJson }}{{ $_ := set $env "LOG_FORMAT" "json" }}{{ end -}}
{{- with .network }}{{ $_ := set $env "NETWORK" . }}{{ end -}}
{{- if .peerCaCrl.enabled }}{{ $_ := set $env "CRL_PATH" "/var/run/secrets/istio/crl/ca-crl.pem" }}{{ end -}}
{{- if eq .culvert.redirect "ebpf" -}}
  {{- $_ := set $env "CULVERT_CGROUP" "/host/cgroup" -}}
  {{- $_ := set $env "CULVERT_PIN_PATH" .culvert.pinPath -}}
  {{- $_ := set $env "CULVERT_HANDOVER" "/var/run/culvert/handover.sock" -}}
  {{- /* For a pod that is deleted without an update: until it has ended there is no next one, which would take new
  connections. After a hand-over there is, and open ones may go on for the whole grace period. */}}
  {{- if ge (.terminationGracePeriodSeconds | int) 5 }}{{ $_ := set $env "CONNECTION_TERMINATION_DEADLINE" "5s" }}{{ end -}}
{{- end -}}
{{- with .culvert.trustDomainAliases }}{{ $_ := set $env "TRUST_DOMAIN_ALIASES" (join "," .) }}{{ end -}}
{{- if .culvert.xdsCache.enabled -}}
  {{- $_ := set $env "CULVERT_XDS_CACHE" "/var/lib/culvert/xds" -}}
  {{- $_ := set $env "CULVERT_XDS_CACHE_MAX_AGE" .culvert.xdsCache.maxAge -}}
{{- end -}}
{{- $env = mergeOverwrite $env (.meshConfig.defaultConfig.proxyMetadata | default dict) (.env | default dict) -}}
{{- range $name, $value := $env }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{- define "culvert.updateStrategy" -}}
{{- if .updateStrategy -}}
  {{- toYaml .updateStrategy -}}
{{- else -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: 1
  maxUnavailable: 0
{{- end -}}
{{- end -}}
