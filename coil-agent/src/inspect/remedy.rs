//! What somebody can do about drops. By name: a reason without an entry here has its description alone.

use coil_common::stats::DropReason;

/// What to do about a reason.
pub(crate) fn remedy(reason: DropReason) -> Option<&'static str> {
    Some(match reason.name() {
        "spoofed_source" => {
            "The pod sends with an address that is not its own; routers and virtual machines in pods need to be told about."
        }
        "unsupported_protocol" => {
            "Use TCP, UDP or ICMP echo towards destinations of an Egress, or exclude the destination (spec.excludedDestinations); SCTP, GRE and ESP pass with --other-protocols=address-only."
        }
        "unsupported_icmp" => {
            "Use TCP, UDP or ICMP echo towards destinations of an Egress, or exclude the destination (spec.excludedDestinations)."
        }
        "fragment_unknown" => {
            "Nothing keeps fragments that come before the first of their datagram: send datagrams that need none."
        }
        "outer_fragment" | "underlay_too_big" => {
            "A link between pod and egress pod takes less than the MTU of the pod's interface: lower the MTU that the CNI plugin gives to pods."
        }
        "extension_headers" => "Send without unusual IPv6 extension headers.",
        "egress_unresolved" => {
            "The pod's annotation names an Egress that is missing or invalid: `kubectl describe pod` shows an Event that says which."
        }
        "no_gateway" => {
            "No egress pod is ready: `kubectl describe egress` and its Deployment say why; `coilctl egress` shows what this node knows."
        }
        "too_big" => {
            "Nothing, if the sender listens to ICMP: it was told the size that fits. Else lower the MTU of the pod or the size of its datagrams."
        }
        "flow_table_full" => {
            "Raise --max-flows of coild; `coilctl conntrack --sort age` shows who makes the flows."
        }
        "nat_table_full" => {
            "Raise --max-nat-entries of coil-egress or the replicas of the Egress; `coilctl conntrack --gateway` shows who has them."
        }
        "ports_exhausted" => {
            "Too many connections to one remote address and port: raise the replicas of the Egress with sessionAffinity: None."
        }
        "destination_full" => {
            "As ports_exhausted, a moment before: nothing is tried for two seconds. Raise the replicas of the Egress."
        }
        "nat_admission" => {
            "The translation table is nearly full: raise --max-nat-entries of coil-egress or the replicas of the Egress."
        }
        "client_flow_quota" | "client_port_quota" => {
            "The client has its share of translations: it leaks connections, or the share of the egress pods is too small for it."
        }
        "pod_flow_quota" => {
            "The pod has its share of the node's flows: it leaks connections, or --max-flows-per-pod of coild is too small for it."
        }
        "already_encapsulated" => {
            "The pod runs a tunnel with offloads through an Egress: switch off transmit offloads of its tunnel device."
        }
        "uncut_datagrams" => {
            "At eth0 of the egress pod and at its interface on the node: `ethtool -K … tx-udp-segmentation off`. coil-egress and coild do that themselves; their logs say why not."
        }
        "merged_tunnel" => {
            "Switch rx-udp-gro-forwarding and rx-gro-list off at the interface where such tunnels come in, or UDP checksums (encap-csum) at who sends them."
        }
        "rewrite_failed" => "Report it, with kernel version and `coilctl maps`.",
        "unknown_gateway" | "inner_destination_mismatch" => {
            "Somebody who is no gateway of this pod sends it tunnel packets; harmless unless it is one of yours."
        }
        "unknown_client" | "inner_source_mismatch" => {
            "Somebody who is no client sends tunnel packets to an egress pod; a client of long standing: is coil-egress up, does it reach the API?"
        }
        "forbidden_destination" => "Such destinations never leave through an Egress.",
        "no_state" => {
            "The egress pod does not know this connection (it was replaced): the application must connect again, and is told so at once with COIL_TCP_MID_STREAM=pick-up in the egress container."
        }
        "address_busy" => {
            "Protocols without ports are for one client for each destination: give the other client an Egress of its own."
        }
        "unknown_reply" => "Nothing: it came late, or somebody looks for open ports.",
        "not_for_gateway" => {
            "Something routes or bridges packets for others to an egress pod: find out what."
        }
        "ttl_exceeded" => "The sender's hop limit is too small, or there is a loop.",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remedies go by names, which may change.
    #[test]
    fn there_is_no_remedy_for_what_does_not_exist() {
        let source = include_str!("remedy.rs");
        let arms = source.lines().filter(|line| line.trim_start().starts_with('"') && line.contains("=>"));
        let mut count = 0;
        for name in arms.flat_map(|line| line.split("=>").next().unwrap_or_default().split('|')) {
            let name = name.trim().trim_matches('"');
            assert!(DropReason::ALL.iter().any(|reason| reason.name() == name), "{name}");
            count += 1;
        }
        assert!(count > 20, "{count}");
    }
}
