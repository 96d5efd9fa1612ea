//! What somebody can do about drops. By name: a reason without an entry here has its description alone.

use coil_common::stats::DropReason;

/// What to do about a reason.
pub(crate) fn remedy(reason: DropReason) -> Option<&'static str> {
    Some(match reason.name() {
        "spoofed_source" => {
            "The pod sends with an address that is not its own; routers and virtual machines in pods need to be told about."
        }
        "unsupported_protocol" | "unsupported_icmp" => {
            "Use TCP, UDP or ICMP echo towards destinations of an Egress, or exclude the destination (spec.excludedDestinations)."
        }
        "fragment" => "Send smaller packets: fragments are not translated.",
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
        "rewrite_failed" => "Report it, with kernel version and `coilctl maps`.",
        "unknown_gateway" | "inner_destination_mismatch" => {
            "Somebody who is no gateway of this pod sends it tunnel packets; harmless unless it is one of yours."
        }
        "unknown_client" | "inner_source_mismatch" => {
            "Somebody who is no client sends tunnel packets to an egress pod; a client of long standing: is coil-egress up, does it reach the API?"
        }
        "forbidden_destination" => "Such destinations never leave through an Egress.",
        "no_state" => {
            "The egress pod does not know this connection (it was replaced): the application must connect again."
        }
        "ttl_exceeded" => "The sender's hop limit is too small, or there is a loop.",
        _ => return None,
    })
}
