//! Command line of `coil-router`.

use std::time::Duration;

use clap::Parser;
use coil_runtime::admin::ListenAddr;
use coil_runtime::duration::GoDuration;
use coil_runtime::telemetry::LogArgs;

/// Routes to the pods of other nodes, where all nodes share one link.
///
/// Its routes stay when it ends.
#[derive(Parser, Clone, Debug)]
pub struct RouterArgs {
    /// Address of the metrics server.
    #[arg(long, env = "COIL_METRICS_ADDR", default_value = ":9388")]
    pub metrics_addr: ListenAddr,
    /// Address of the health server.
    #[arg(long, env = "COIL_HEALTH_ADDR", default_value = ":9389")]
    pub health_addr: ListenAddr,
    /// Protocol identifier of our routes. Routes that have it are ours: nothing else may use it, coild included.
    #[arg(long, env = "COIL_ROUTER_PROTOCOL_ID", default_value_t = 31, value_parser = clap::value_parser!(u8).range(5..))]
    pub protocol_id: u8,
    /// Routes are compared with the kernel's so often, even if nothing has changed.
    #[arg(long, env = "COIL_ROUTER_UPDATE_INTERVAL", default_value_t = GoDuration(Duration::from_secs(600)))]
    pub update_interval: GoDuration,
    /// Name of the node that this runs on.
    #[arg(long, env = "COIL_NODE_NAME", default_value = "", hide_default_value = true)]
    pub node_name: String,
    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn flags_of_the_original() {
        let args =
            ["coil-router", "--zap-stacktrace-level=panic", "--update-interval=1m", "--protocol-id=40"];
        let args = RouterArgs::try_parse_from(args).unwrap();
        assert_eq!((args.protocol_id, args.update_interval.0), (40, Duration::from_secs(60)));
        let args = RouterArgs::try_parse_from(["coil-router"]).unwrap();
        assert_eq!((args.protocol_id, args.update_interval.0), (31, Duration::from_secs(600)));
        assert_eq!((args.metrics_addr.port, args.health_addr.port), (9388, 9389));
        // Those of the kernel and of people.
        assert!(RouterArgs::try_parse_from(["coil-router", "--protocol-id=2"]).is_err());
    }
}
