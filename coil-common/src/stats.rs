//! Indices of counters.

/// Declares an enum of counter indices with a name and, from its documentation, a description for each.
macro_rules! indices {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[doc = $doc])+ $variant,)+ }

        impl $name {
            /// All of them, in the order of their indices.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Name in metrics and listings.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// What it means in a sentence or two: the documentation of the variant, which begins with
            /// a space.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+),)+ }
            }

            /// The one with this index, if there is one.
            #[must_use]
            pub fn from_index(index: u32) -> Option<Self> {
                usize::try_from(index).ok().and_then(|index| Self::ALL.get(index).copied())
            }

            /// Index in the per-CPU array.
            #[inline(always)]
            #[must_use]
            pub const fn index(self) -> u32 {
                self as u32
            }
        }
    };
}

indices! {
    /// Why a packet was dropped.
    DropReason {
        /// Ends inside a header.
        Truncated = "truncated",
        /// A header with impossible lengths or version.
        Malformed = "malformed",
        /// From a pod, with a source address that is not the pod's.
        SpoofedSource = "spoofed_source",
        /// For an egress, with an IP protocol that is not translated.
        UnsupportedProtocol = "unsupported_protocol",
        /// For an egress, an ICMP message that is not translated.
        UnsupportedIcmp = "unsupported_icmp",
        /// For an egress, a fragmented ICMP error.
        Fragment = "fragment",
        /// For an egress, with IPv6 extension headers that are not understood, or too many.
        ExtensionHeaders = "extension_headers",
        /// The pod's Egress is missing or invalid: fails closed.
        EgressUnresolved = "egress_unresolved",
        /// No gateway of the Egress is ready.
        NoGateway = "no_gateway",
        /// Too large for the tunnel; the sender was told by ICMP.
        TooBig = "too_big",
        /// The flow table of the node is full.
        FlowTableFull = "flow_table_full",
        /// Already a tunnel packet of the sender's, which cannot be encapsulated again.
        AlreadyEncapsulated = "already_encapsulated",
        /// The kernel refused to change the packet.
        RewriteFailed = "rewrite_failed",
        /// Tunnelled, to a client pod, from an address that is not one of its gateways.
        UnknownGateway = "unknown_gateway",
        /// Tunnelled, to a gateway, from an address that is not a registered client.
        UnknownClient = "unknown_client",
        /// Tunnelled, to a gateway, the inner source differs from the outer.
        InnerSourceMismatch = "inner_source_mismatch",
        /// Tunnelled, the inner destination is not the pod.
        InnerDestinationMismatch = "inner_destination_mismatch",
        /// A destination that no gateway may send to: loopback, link-local, multicast, its own.
        ForbiddenDestination = "forbidden_destination",
        /// TCP without a translation, and not a SYN.
        NoState = "no_state",
        /// No free port towards the destination.
        PortsExhausted = "ports_exhausted",
        /// The translation table is full.
        NatTableFull = "nat_table_full",
        /// TTL or hop limit reached zero.
        TtlExceeded = "ttl_exceeded",
        /// An ICMP error about a packet of no known flow.
        IcmpNoFlow = "icmp_no_flow",
        /// An ICMP error whose addresses do not go with those of the packet that it quotes.
        IcmpMismatch = "icmp_mismatch",
        /// An ICMP error of whose quote too little is there, or nothing that is translated.
        IcmpQuote = "icmp_quote",
        /// An ICMP error that quotes a later fragment, which has no ports.
        IcmpQuoteFragment = "icmp_quote_fragment",
        /// A later fragment whose first one has not been seen (lost, late, or out of order).
        FragmentUnknown = "fragment_unknown",
        /// A first fragment whose identification belongs to the unfinished datagram of another client.
        FragmentConflict = "fragment_conflict",
        /// A fragment of a tunnelled packet.
        OuterFragment = "outer_fragment",
        /// An ICMP error about a tunnelled packet that was too big for some link between pod and
        /// gateway: the sender of the packet inside was told.
        UnderlayTooBig = "underlay_too_big",
        /// To an egress pod, but for somebody else, and in no tunnel: with `--same-node-bypass` such packets
        /// are taken from clients of the same node alone.
        NotForGateway = "not_for_gateway",
        /// A new flow to a destination towards which no port was free a moment ago.
        DestinationFull = "destination_full",
        /// The translation table is so full that it admits no new flows.
        NatAdmission = "nat_admission",
        /// The client has as many translations as it may have.
        ClientFlowQuota = "client_flow_quota",
        /// The client has as many translations to the destination as it may have.
        ClientPortQuota = "client_port_quota",
        /// The pod has as many flows in the node's table as it may have.
        PodFlowQuota = "pod_flow_quota",
        /// A protocol without ports, to a destination that another client is talking to by it.
        AddressBusy = "address_busy",
        /// From the world to a port of translation, but no reply to anybody.
        UnknownReply = "unknown_reply",
        /// UDP datagrams in one piece (GSO) that come out of a tunnel by FOU: they were to be cut apart before,
        /// since the kernel would now do it at the wrong place.
        UncutDatagrams = "uncut_datagrams",
        /// Tunnelled packets that an interface has merged into one (GRO of UDP), so that what is inside of
        /// each is not found.
        MergedTunnel = "merged_tunnel",
    }
}

indices! {
    /// What a gateway counts besides drops.
    GatewayStat {
        /// From clients, translated and sent on, IPv4.
        MasqueradedV4 = "masqueraded_v4",
        /// From clients, translated and sent on, IPv6.
        MasqueradedV6 = "masqueraded_v6",
        /// Replies, translated and sent back, IPv4.
        ReplyV4 = "reply_v4",
        /// Replies, translated and sent back, IPv6.
        ReplyV6 = "reply_v6",
        /// New translations, IPv4; bytes are not counted.
        NewFlowV4 = "new_flow_v4",
        /// New translations, IPv6; bytes are not counted.
        NewFlowV6 = "new_flow_v6",
        /// Drops for [`DropReason::NoState`], IPv4.
        InvalidV4 = "invalid_v4",
        /// Drops for [`DropReason::NoState`], IPv6.
        InvalidV6 = "invalid_v6",
    }
}

indices! {
    /// What has become of ICMP errors. Each counts as one packet; bytes are not counted.
    IcmpStat {
        /// Made by the datapath in place of a dropped packet.
        Answered = "answered",
        /// Not made, since too many were made already.
        Suppressed = "suppressed",
        /// Not made, since the packet could not be turned into one.
        Unanswerable = "unanswerable",
        /// From outside, translated for a pod.
        ToPod = "to_pod",
        /// From a pod, translated for the outside.
        FromPod = "from_pod",
    }
}

/// Direction of an egress counter, as the pod sees it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the pod.
    Tx = 0,
    /// To the pod.
    Rx = 1,
}

/// Index into `egress_stats` of an index into `egresses`.
#[inline(always)]
#[must_use]
pub const fn egress_stat(egress: u32, direction: Direction) -> u32 {
    egress * 2 + direction as u32
}
