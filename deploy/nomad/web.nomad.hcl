# A Nomad job with a protector in each allocation: docs/fleet.md.  It parses; no Nomad has run it here.
#
#     nomad job validate web.nomad.hcl

job "web" {
  type = "service"

  update {
    max_parallel     = 1
    canary           = 1
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "2m"
    progress_deadline = "10m"
    # A canary that does not become healthy ends; the job goes back to the version before.
    auto_revert  = true
    auto_promote = true
  }

  group "web" {
    count = 3

    # Between the end of the service's registration and TERM.  --lame-duck serves those that come
    # later, so it is short.
    shutdown_delay = "2s"

    network {
      port "http" {}
      port "metrics" {}
    }

    service {
      name     = "web"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        port     = "metrics"
        path     = "/readyz/web"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "web" {
      driver = "docker"
      # More than --lame-duck, --stop-timeout and --kill-timeout together: 10 + 30 + 5.  The client's
      # max_kill_timeout (30s by default) has to be as long.
      kill_timeout = "50s"
      kill_signal  = "SIGTERM"

      config {
        image      = "registry.example.org/web:1"
        ports      = ["http"]
        entrypoint = ["SocketProtector", "-f", "--name", "web", "--control", "${NOMAD_ALLOC_DIR}/web.control",
                      "--lame-duck", "10s", "--stop-timeout", "30s", "--kill-timeout", "5s"]
        args       = ["${NOMAD_PORT_http}", "--", "python", "web.py"]
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }

    task "exporter" {
      driver = "docker"

      lifecycle {
        hook    = "poststart"
        sidecar = true
      }

      config {
        image      = "registry.example.org/web:1"
        ports      = ["metrics"]
        entrypoint = ["socketprotector-exporter", "--listen", "0.0.0.0:${NOMAD_PORT_metrics}"]
        args       = ["--control", "${NOMAD_ALLOC_DIR}/web.control"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
